"""Turns a chosen variant into a signed OCI package, and hands its files to the gateways that may have them."""
