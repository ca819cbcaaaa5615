"""Where linear layers are captured and replaced."""
