"""Whole experiments, from data to report, each behind one command."""
