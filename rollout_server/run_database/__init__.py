"""What a run leaves behind: listing, export, replay."""
