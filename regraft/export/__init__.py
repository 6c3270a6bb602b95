"""Merging an adapter into its base model, and publishing the merged files only once they are proved on disk."""
