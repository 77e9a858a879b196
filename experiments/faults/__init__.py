"""Faults on purpose: runs that are disturbed at random, each against one that is not."""
