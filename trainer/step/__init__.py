"""One optimizer step: its passes, its loss, its guard, its clock."""
