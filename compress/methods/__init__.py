"""The compression methods, one folder each; ``registry`` lists them."""
