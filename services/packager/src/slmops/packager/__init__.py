"""The packager turns a chosen variant into a signed OCI package and gives its files to authorized gateways."""
