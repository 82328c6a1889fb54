"""The interfaces of others: AutoAttack's, and those of experiment trackers."""
