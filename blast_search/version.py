"""The version, alone in a file so that building a wheel needs no torch."""

VERSION = "0.1.0"
