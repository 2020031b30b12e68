"""Plumbing that every service needs: bus, journal, objects, settings, tracing, clock."""
