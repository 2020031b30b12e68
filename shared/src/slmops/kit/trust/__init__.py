"""Trust with TUF and DSSE. `tuf` and `securesystemslib` do all signatures and checks. Extra: `trust`.

keys       private keys as PEM files
client     a client's trusted state on disk: verified metadata, accepted completely or not at all
asking     the interface for requests, answered by the bus or a bundle
attacks    maps errors of the library to attacks
plans      signs and opens plans in their envelopes
folder     the offline half of a repository as files
ceremony   key ceremony, rotation, revocation, and signing by one keyholder at a time
overview   the state of such a folder
http       the library's client over plain HTTP, for the command line
bus        fetches metadata over the bus, for a gateway
"""
