"""What the images are worth: the classes they reach, and who recognises them."""
