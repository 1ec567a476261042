"""The fault campaign, `campaign.py`: kills, damage and bad conditions for small runs, whose results must equal an unbroken run's
to the bit. `attempt.py` starts a run, `injected.py` is what goes wrong inside its ranks, the others are the faults."""
