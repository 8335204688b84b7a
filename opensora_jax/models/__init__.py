"""The networks: denoisers, autoencoders, text encoders."""
