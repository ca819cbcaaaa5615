"""What quantizing and running a model will take, from its config alone: bytes, devices, time."""
