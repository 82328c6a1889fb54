"""Attacks as state machines over rows (image, target, restart), and what an ensemble of them is"""
