"""Training, comparison and plots from the command line; needs the extra ``train``."""
