"""What schedules cost and give for a fixed number of images."""
