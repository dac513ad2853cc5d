"""Methods that act in the vision stage."""
