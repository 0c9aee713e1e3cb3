"""Images as files: a request becomes jobs, a writer makes their images, and each file says how it was made."""
