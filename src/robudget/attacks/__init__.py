"""Attacks as state machines over rows (image, target, restart), each also callable alone: `pgd.pgd`, `apgd.apgd`, …"""
