"""The page of the server: one image, its maps before and after the patch, how long both take."""
