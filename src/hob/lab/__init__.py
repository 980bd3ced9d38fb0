"""Measuring the engine on the user's own machine. Above the engine, below the command line."""
