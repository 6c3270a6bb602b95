"""One Prefect task a step: retries, timeouts, tags and artifacts; what a step does is in `regraft`."""
