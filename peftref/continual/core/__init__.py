"""What the methods of this part are made of and share."""
