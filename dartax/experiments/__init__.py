"""Training and plotting from the command line; needs the extra ``train``."""
