"""How a message travels, and its codecs."""

from ds_decoupled.links.codec import Codec
from ds_decoupled.links.local import LocalLink
from ds_decoupled.links.message import Message
from ds_decoupled.links.remote import RemoteReceiver, RemoteSender, buffer_device
from ds_decoupled.links.ring import ReplayRing
from ds_decoupled.links.table import CODECS, Codecs, codecs_of

__all__ = ["CODECS", "Codec", "Codecs", "LocalLink", "Message", "RemoteReceiver", "RemoteSender", "ReplayRing", "buffer_device",
           "codecs_of"]
