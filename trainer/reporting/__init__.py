"""What a run says of itself: figures, ledger, alarms, samples of completions."""
