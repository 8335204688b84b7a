"""Encoded video and images: probing, decoding, geometry of frames, writing."""
