"""Autotuning: `sparse-compile tune` finds the best tiles of every kernel on this machine."""
