"""What a user's script does to model, optimizer and ranks: followed where it is certain, refused in words otherwise."""
