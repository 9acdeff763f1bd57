"""What training costs, against TRL on the same tokens."""
