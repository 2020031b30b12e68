"""Builds a gateway's image with a package inside."""
