"""One run: training, resume, and the commands on a finished run."""
