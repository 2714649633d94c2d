"""Batch jobs: a deployment rendered as a job of the site's scheduler, and what runs on every node of that job."""
