"""How the trajectory stream talks to Redis: one bounded, retried call, and the scripts that must be atomic.

Private to :mod:`opd_mesh.stream`. Every command sent through :class:`RedisLink` is idempotent, so a lost answer is
cured by asking again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from opd_mesh.errors import ConfigError, OverloadedError, StreamUnavailableError

OVERLOAD_RETRY_DELAY_S = 1.0
FIRST_RETRY_DELAY_S = 0.02
LAST_RETRY_DELAY_S = 0.5

# Scripts run alone on the server: keep the pages they are given small. A full server refuses a script as a whole unless
# it says `allow-oom`; only `publish` may be refused. The others make room, so refusing them would lock the stream up.
SCRIPTS = {
    # stream | group → nothing; the group sees the stream from its beginning
    "group": """#!lua flags=allow-oom
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if made.err and not string.find(made.err, 'BUSYGROUP') then return made end
""",
    # lease key | milliseconds → nothing
    "lease": """#!lua flags=allow-oom
redis.call('SET', KEYS[1], 'alive', 'PX', ARGV[1])
""",
    # stream, ids | (trajectory_id, payload)... → {entry id, 1 when the contents are the same, ...}
    "publish": """#!lua
local answer = {}
for i = 1, #ARGV, 2 do
  local known = redis.call('HGET', KEYS[2], ARGV[i])
  local entry = known and redis.call('XRANGE', KEYS[1], known, known)[1]
  if entry then
    answer[i], answer[i + 1] = known, (entry[2][4] == ARGV[i + 1]) and 1 or 0
  else
    local added = redis.call('XADD', KEYS[1], '*', 'id', ARGV[i], 'payload', ARGV[i + 1])
    redis.call('HSET', KEYS[2], ARGV[i], added)
    answer[i], answer[i + 1] = added, 1
  end
end
return answer
""",
    # stream | group, new owner, old owner, entry ids... → {{entry id, deliveries, {field, value, ...}}, ...}
    # An entry that somebody deleted while it was pending comes back with 0 deliveries and no fields, once.
    "claim": """#!lua flags=allow-oom
local taken = {}
for i = 4, #ARGV do
  local id = ARGV[i]
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)[1]
  if pending and pending[2] == ARGV[3] then
    local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
    if entry then
      redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, id)
      taken[#taken + 1] = {id, pending[4] + 1, entry[2]}
    else
      redis.call('XACK', KEYS[1], ARGV[1], id)
      taken[#taken + 1] = {id, 0, {}}
    end
  end
end
return taken
""",
    # stream, dead, ids | group, entry id, reason → 1 when it was pending
    # Copied before it is removed: if the copy fails, nothing has happened.
    "bury": """#!lua flags=allow-oom
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1]
if not pending then return 0 end
local entry = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])[1]
if entry then
  local fields = entry[2]
  for _, word in ipairs({'deliveries', pending[4], 'reason', ARGV[3]}) do fields[#fields + 1] = word end
  redis.call('XADD', KEYS[2], '*', unpack(fields))
  for i = 1, #fields, 2 do
    if fields[i] == 'id' then redis.call('HDEL', KEYS[3], fields[i + 1]) end
  end
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
return 1
""",
    # stream, dead, ids → 1 when one dead letter went back, 0 when there is none
    "requeue": """#!lua flags=allow-oom
local letter = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
if not letter then return 0 end
local values = {}
for i = 1, #letter[2], 2 do values[letter[2][i]] = letter[2][i + 1] end
if values['id'] and values['payload'] then
  local added = redis.call('XADD', KEYS[1], '*', 'id', values['id'], 'payload', values['payload'])
  redis.call('HSET', KEYS[3], values['id'], added)
end
redis.call('XDEL', KEYS[2], letter[1])
return 1
""",
    # stream, ids | group, entry ids... → how many were pending
    "acknowledge": """#!lua flags=allow-oom
local acknowledged = 0
for i = 2, #ARGV do
  local entry = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1]
  local was_pending = redis.call('XACK', KEYS[1], ARGV[1], ARGV[i])
  if was_pending == 1 then
    acknowledged = acknowledged + 1
    if entry and entry[2][1] == 'id' then redis.call('HDEL', KEYS[2], entry[2][2]) end
  end
end
return acknowledged
""",
    # stream | at most → how many were trimmed: all below the oldest entry that some group has yet to acknowledge
    "trim": """#!lua flags=allow-oom
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local function split(id)
  local ms, seq = string.match(id, '(%d+)-(%d+)')
  return tonumber(ms), tonumber(seq)
end
local keep_ms, keep_seq = nil, nil
for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local group = {}
  for i = 1, #flat, 2 do group[flat[i]] = flat[i + 1] end
  local ms, seq
  if group['pending'] > 0 then
    ms, seq = split(redis.call('XPENDING', KEYS[1], group['name'])[2])
  else
    ms, seq = split(group['last-delivered-id'])
    seq = seq + 1
  end
  if not keep_ms or ms < keep_ms or (ms == keep_ms and seq < keep_seq) then keep_ms, keep_seq = ms, seq end
end
if not keep_ms then return 0 end
local first_kept = string.format('%.0f-%.0f', keep_ms, keep_seq)
return redis.call('XTRIM', KEYS[1], 'MINID', '=', first_kept)
""",
}


class GroupMissingError(StreamUnavailableError):
    """NOGROUP: the data went away under us (a flush, or a server restarted without its append-only file)."""


class RedisLink:
    """A client whose every call ends within ``timeout_s``, with an :class:`OpdError` that names the server.

    Raises:
        ConfigError: ``url`` is not a Redis URL.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = redacted_url(url)
        self._timeout_s = timeout_s
        try:
            self.redis: Redis = Redis.from_url(
                url,
                protocol=2,  # one shape of answers, whatever redis-py's default is
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),  # call() retries, within one bound for the whole call
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{self.url} is not a Redis URL (redis://, rediss:// or unix://): {error}", field="redis_url"
            ) from error
        self._scripts = {name: self.redis.register_script(source) for name, source in SCRIPTS.items()}

    async def script(self, name: str, keys: Sequence[str], args: Sequence[str | bytes | int] = ()) -> Any:
        """Run one of ``SCRIPTS``; errors as :meth:`call`."""
        return await self.call(name, lambda: self._scripts[name](keys=list(keys), args=list(args)))

    async def call(self, what: str, command: Callable[[], Awaitable[Any]], extra_s: float = 0.0) -> Any:
        """Run an idempotent command, reconnecting for ``timeout_s`` (plus ``extra_s`` that it may wait by itself).

        Raises:
            StreamUnavailableError: no answer in that time, or a refusal that waiting does not mend.
            OverloadedError: the server is full.
            GroupMissingError: as it says.
        """
        last_error: Exception | None = None
        delay_s = FIRST_RETRY_DELAY_S
        try:
            async with asyncio.timeout(self._timeout_s + extra_s):
                while True:
                    try:
                        return await command()
                    except redis_errors.AuthenticationError as error:
                        raise StreamUnavailableError(
                            f"Redis at {self.url} refuses the credentials ({error}): check user and password in its URL"
                        ) from error
                    except (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError) as error:
                        last_error = error
                    except redis_errors.ResponseError as error:
                        raise self._refusal(what, error) from error
                    await asyncio.sleep(delay_s)
                    delay_s = min(delay_s * 2, LAST_RETRY_DELAY_S)
        except TimeoutError as timeout:
            raise StreamUnavailableError(
                f"Redis at {self.url} did not answer {what} within {self._timeout_s:g} s "
                f"({last_error or 'connected, but silent'}). Is the server running, and is OPD_REDIS_URL right? "
                "Nothing published is lost: restart the server on its data directory and resume the run"
            ) from (last_error or timeout)

    def _refusal(self, what: str, error: redis_errors.ResponseError) -> Exception:
        text = str(error)
        if isinstance(error, redis_errors.OutOfMemoryError) or text.startswith("OOM"):
            return OverloadedError(
                f"Redis at {self.url} is full (maxmemory): the trainer has to catch up before more is accepted",
                retry_delay_s=OVERLOAD_RETRY_DELAY_S,
            )
        if "NOGROUP" in text or "no such key" in text:
            return GroupMissingError(f"the consumer group has gone from Redis at {self.url}; was it flushed? ({text})")
        return StreamUnavailableError(f"Redis at {self.url} refused {what}: {text}")


def redacted_url(url: str) -> str:
    """``url`` fit for a log: no password, and no query (redis-py takes credentials there too)."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "<not a URL>"
    if not parts.scheme:
        return "<not a URL>"
    if "@" in url[len(parts.scheme) + 3 + len(parts.netloc) :]:
        # A password with an unescaped / or ? has torn the URL apart: nothing in it can be trusted to be harmless.
        return f"{parts.scheme}://***"
    netloc = re.sub(r"^([^:]*):.*@", r"\1:***@", parts.netloc)
    return f"{parts.scheme}://{netloc}{parts.path}"
