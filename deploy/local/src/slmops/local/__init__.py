"""The whole system in one supervised process tree, with its data under one folder."""
