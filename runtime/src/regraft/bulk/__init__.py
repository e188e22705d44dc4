"""Bulk extraction: a folder of Parquet shards that any number of interrupted runs complete.

The list of images is cut into shards of equal size, so that shard ``i`` holds the same images
whoever computes it. A shard is written beside and renamed once it is whole; what is there is done,
what is not there is to do. Nothing else is remembered, so a run may be killed at any moment.

==================  ======================================================================
module              does
==================  ======================================================================
``job``             what was asked for, written down, so that two runs never mix
``folder``          the folder: resuming, the lock, which shards are done, publishing
``work``            computes one shard
``processes``       spreads shards over processes of this machine
``on_ray``          spreads shards over a Ray cluster
``ray_plan``        how many actors that has room for, and what they book
``crews``           who of these computes, as asked for
==================  ======================================================================
"""
