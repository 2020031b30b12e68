"""Fleet measurements, summed into windows per blueprint and release."""
