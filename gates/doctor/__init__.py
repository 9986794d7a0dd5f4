"""What of this machine will matter to a run: facts, what follows from them, recommended flags."""
