"""Methods that evaluate the model themselves, so that each is a whole training step."""
