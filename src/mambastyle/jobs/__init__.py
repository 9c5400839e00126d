"""Big jobs: one operation on many pictures, resumable, divisible, and a bad picture costs itself alone.

    items -> [read, decode] -> compute -> [encode] -> sink -> manifest

`items` lists folders and webdataset tars, `work` says what is done, `pipeline` overlaps the steps, `sinks`
write files or tars, `manifest` remembers what is done, and `engines` run it in this process or on Ray.
"""
