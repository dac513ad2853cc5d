"""Methods that act in the decoder stage."""
