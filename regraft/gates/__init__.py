"""From reports and answers to verdicts. A gate without evidence says no."""
