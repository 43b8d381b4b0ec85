/**
 * A vhost-user back-end that loops frames back, and does what it is told, right or wrong. Runs as a worker thread or as a process
 * of its own, because the front-end blocks. Each message to the thread is a back-end to be, one after the other: to start a thread takes
 * longer than most tests.
 *
 * It shares no code with `src`: system calls through koffi, layouts written down again from QEMU's vhost-user.rst and from Virtio 1.4,
 * 2.7 and 2.8. It is strict about what a front-end may send, and calls every offence a violation. Rules (see `fake.ts`) change its answer to
 * single messages.
 */

import { parentPort } from 'node:worker_threads';
import koffi from 'koffi';

const c = koffi.load(null);
const sys = {
  socket: c.func('int socket(int, int, int)'),
  bind: c.func('int bind(int, void *, uint32_t)'),
  listen: c.func('int listen(int, int)'),
  accept: c.func('int accept(int, void *, void *)'),
  connect: c.func('int connect(int, void *, uint32_t)'),
  poll: c.func('int poll(void *, uint64_t, int)'),
  recvmsg: c.func('int64_t recvmsg(int, void *, int)'),
  sendmsg: c.func('int64_t sendmsg(int, void *, int)'),
  read: c.func('int64_t read(int, void *, uint64_t)'),
  write: c.func('int64_t write(int, void *, uint64_t)'),
  close: c.func('int close(int)'),
  mmap: c.func('int64_t mmap(int64_t, uint64_t, int, int, int, int64_t)'),
  munmap: c.func('int munmap(int64_t, uint64_t)'),
};
/** What the back-end of the moment is to be, as `fake.ts` says it. */
let path;
let device;
let rules;
let connect;
let stopFlag;
/** What it offers. */
let offered;
let offeredProtocol;
/** What the front-end has set, and how many requests of a kind have come. */
let state;
let seen;

function become(setup) {
  ({ path, device, rules, connect } = setup);
  stopFlag = new Int32Array(setup.stop ?? 1);
  offered = BigInt(device.features);
  offeredProtocol = BigInt(device.protocolFeatures);
  state = { features: 0n, protocol: 0n, regions: [], rings: new Map(), status: 0, owner: false };
  seen = new Map();
}

const stopped = () => Atomics.load(stopFlag, 0) !== 0;
const tell = (event) => {
  if (parentPort !== null) parentPort.postMessage(event);
  else process.stdout.write(`${JSON.stringify(event)}\n`);
};
const CLOSED = Symbol('closed');
const violation = (what) => tell({ event: 'violation', what });

const Proto = { MQ: 0, REPLY_ACK: 3, CONFIG: 9, RESET_DEVICE: 13, MEM_SLOTS: 15, STATUS: 16 };
const Bit = { MRG_RXBUF: 15, EVENT_IDX: 29, PROTOCOL_FEATURES: 30, RING_PACKED: 34, IN_ORDER: 35 };
const has = (set, bit) => ((set >> BigInt(bit)) & 1n) === 1n;

function wait(fd, ms) {
  const pollfd = Buffer.alloc(8);
  pollfd.writeInt32LE(fd, 0);
  pollfd.writeInt16LE(1, 4);
  if (stopped()) throw CLOSED;
  return sys.poll(pollfd, 1, ms) > 0;
}

function message(base, length, control) {
  const header = Buffer.alloc(72);
  header.writeBigUInt64LE(BigInt(koffi.address(header)) + 56n, 16);
  header.writeBigUInt64LE(1n, 24);
  header.writeBigUInt64LE(BigInt(koffi.address(base)), 56);
  header.writeBigUInt64LE(BigInt(length), 64);
  if (control !== null) {
    header.writeBigUInt64LE(BigInt(koffi.address(control)), 32);
    header.writeBigUInt64LE(BigInt(control.length), 40);
  }
  return header;
}

function receive(fd, length, fds) {
  const data = Buffer.alloc(length);
  for (let done = 0; done < length; ) {
    while (!wait(fd, 5));
    const part = Buffer.alloc(length - done);
    const control = Buffer.alloc(1040);
    const header = message(part, part.length, control);
    const count = Number(sys.recvmsg(fd, header, 0));
    if (count <= 0) throw CLOSED;
    if (header.readUInt32LE(40) >= 20) {
      for (let at = 16; at + 4 <= control.readUInt32LE(0); at += 4) fds.push(control.readInt32LE(at));
    }
    part.copy(data, done, 0, count);
    done += count;
  }
  return data;
}

function send(fd, bytes, fds = []) {
  let control = null;
  if (fds.length > 0) {
    control = Buffer.alloc(Math.ceil((16 + 4 * fds.length) / 8) * 8);
    control.writeUInt32LE(16 + 4 * fds.length, 0);
    control.writeInt32LE(1, 8);
    control.writeInt32LE(1, 12);
    for (const [i, value] of fds.entries()) control.writeInt32LE(value, 16 + 4 * i);
  }
  let rest = Buffer.from(bytes);
  while (rest.length > 0) {
    const sent = Number(sys.sendmsg(fd, message(rest, rest.length, control), 0x4000));
    if (sent < 0) throw CLOSED;
    rest = rest.subarray(sent);
    control = null;
  }
}

const u64 = (value) => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt.asUintN(64, BigInt(value)));
  return bytes;
};

function mapRegion(bytes, at, fd) {
  const field = (i) => Number(bytes.readBigUInt64LE(at + 8 * i));
  const [guest, size, user, offset] = [field(0), field(1), field(2), field(3)];
  const length = offset + size;
  const address = Number(sys.mmap(0, length, 3, 1, fd, 0));
  if (address === -1) violation('memory that cannot be mapped');
  const buffer = koffi.view(BigInt(address), length);
  const views = { u8: new Uint8Array(buffer), u16: new Uint16Array(buffer), u32: new Uint32Array(buffer) };
  sys.close(fd);
  return { guest, size, user, offset, address, length, ...views };
}

function dropRegions(gone) {
  for (const { address, length } of gone) sys.munmap(address, length);
}

/** Where `count` bytes are, by guest or user address. */
function find(kind, address, count) {
  for (const region of state.regions) {
    const at = address - region[kind];
    if (at >= 0 && at + count <= region.size) return { region, at: at + region.offset };
  }
  violation(`${kind} address ${address.toString(16)} with ${count} bytes is in no region`);
  throw CLOSED;
}

const ringOf = (index) => {
  let ring = state.rings.get(index);
  if (ring === undefined) {
    ring = { index, size: 0, base: 0, areas: null, kick: -1, call: -1, err: -1, enabled: false, kicked: false };
    state.rings.set(index, ring);
  }
  return ring;
};

const EventField = { 12: 'kick', 13: 'call', 14: 'err' };
/** Bytes of payload and number of descriptors that each request has; -1: looked at where it is served. */
const SHAPES = {
  1: [0, 0],
  2: [8, 0],
  3: [0, 0],
  5: [-1, -1],
  8: [8, 0],
  9: [40, 0],
  10: [8, 0],
  11: [8, 0],
  12: [8, -1],
  13: [8, -1],
  14: [8, -1],
  15: [0, 0],
  16: [8, 0],
  17: [0, 0],
  18: [8, 0],
  24: [-1, 0],
  34: [0, 0],
  36: [0, 0],
  37: [40, 1],
  38: [40, 0],
  39: [8, 0],
  40: [0, 0],
};

/** Does what a request asks; returns the payload of its own reply, undefined when it has none, false when it is refused. */
function serve({ request, payload, fds }) {
  const shape = SHAPES[request];
  if (shape === undefined) violation(`request ${request}`);
  else if (shape[0] >= 0 && payload.length !== shape[0]) violation(`request ${request} of ${payload.length} bytes`);
  else if (shape[1] >= 0 && fds.length !== shape[1]) violation(`request ${request} with ${fds.length} descriptors`);
  const protocol = (name) => {
    if (!has(state.protocol, Proto[name])) violation(`request ${request} without ${name}`);
  };
  switch (request) {
    case 1:
      return u64(offered);
    case 2: {
      const wanted = payload.readBigUInt64LE(0);
      if ((wanted & ~offered) !== 0n) violation(`features ${wanted.toString(16)} of ${offered.toString(16)}`);
      if ([...state.rings.values()].some(isStarted) && wanted !== state.features) violation('features while running');
      state.features = wanted;
      return undefined;
    }
    case 3:
      if (state.owner) violation('a second SET_OWNER');
      state.owner = true;
      return undefined;
    case 5: {
      const count = payload.readUInt32LE(0);
      if (count < 1 || count > 8 || payload.length !== 8 + 32 * count || fds.length !== count) {
        violation(`a table of ${count} regions in ${payload.length} bytes with ${fds.length} descriptors`);
        return false;
      }
      const old = state.regions;
      state.regions = fds.map((fd, i) => mapRegion(payload, 8 + 32 * i, fd));
      dropRegions(old);
      return undefined;
    }
    case 8:
      ringOf(payload.readUInt32LE(0)).size = payload.readUInt32LE(4);
      return undefined;
    case 9: {
      const ring = ringOf(payload.readUInt32LE(0));
      const packed = has(state.features, Bit.RING_PACKED);
      const at = (i) => Number(payload.readBigUInt64LE(i));
      const sizes = packed ? [16 * ring.size, 4, 4] : [16 * ring.size, 6 + 8 * ring.size, 6 + 2 * ring.size];
      if (payload.readUInt32LE(4) !== 0) violation('a flag in SET_VRING_ADDR');
      ring.areas = {
        desc: find('user', at(8), sizes[0]),
        used: find('user', at(16), sizes[1]),
        avail: find('user', at(24), sizes[2]),
        addresses: [at(8), at(16), at(24)],
        sizes,
      };
      return undefined;
    }
    case 10:
      ringOf(payload.readUInt32LE(0)).base = payload.readUInt32LE(4);
      return undefined;
    case 11: {
      const ring = ringOf(payload.readUInt32LE(0));
      if (!isStarted(ring)) violation(`GET_VRING_BASE of ring ${ring.index} that has not started`);
      for (const fd of [ring.kick, ring.call, ring.err]) if (fd >= 0) sys.close(fd);
      state.rings.delete(ring.index);
      const answer = Buffer.alloc(8);
      answer.writeUInt32LE(ring.index, 0);
      answer.writeUInt32LE((ring.availIndex ?? 0) & 0xffff, 4);
      return answer;
    }
    case 12:
    case 13:
    case 14: {
      const number = payload.readUInt32LE(0);
      const [ring, none] = [ringOf(number & 0xff), (number & 0x100) !== 0];
      if (fds.length !== (none ? 0 : 1)) violation(`an event with ${fds.length} descriptors`);
      if (ring.size === 0 || ring.areas === null) violation(`an event of ring ${ring.index} that is not described`);
      if (ring[EventField[request]] >= 0) sys.close(ring[EventField[request]]);
      ring[EventField[request]] = fds[0] ?? -1;
      if (request === 12) start(ring);
      return undefined;
    }
    case 15:
      return u64(offeredProtocol);
    case 16:
      state.protocol = payload.readBigUInt64LE(0);
      if ((state.protocol & ~offeredProtocol) !== 0n) violation('protocol features that were not offered');
      return undefined;
    case 17:
      protocol('MQ');
      return u64(device.queuePairs ?? 1);
    case 18: {
      if (!has(state.features, Bit.PROTOCOL_FEATURES)) violation('SET_VRING_ENABLE without protocol features');
      ringOf(payload.readUInt32LE(0)).enabled = payload.readUInt32LE(4) === 1;
      return undefined;
    }
    case 24: {
      protocol('CONFIG');
      const [offset, size] = [payload.readUInt32LE(0), payload.readUInt32LE(4)];
      if (payload.length !== 12 + size) violation('GET_CONFIG whose size is not its own');
      const config = Buffer.from(device.config ?? []);
      if (offset + size > config.length) return Buffer.alloc(0);
      return Buffer.concat([payload.subarray(0, 12), config.subarray(offset, offset + size)]);
    }
    case 34:
      protocol('RESET_DEVICE');
      return undefined;
    case 36:
      protocol('MEM_SLOTS');
      return u64(device.memorySlots ?? 16);
    case 37: {
      protocol('MEM_SLOTS');
      const region = mapRegion(payload, 8, fds[0]);
      if (state.regions.length >= (device.memorySlots ?? 16)) violation('more regions than slots');
      state.regions.push(region);
      return undefined;
    }
    case 38: {
      protocol('MEM_SLOTS');
      const guest = Number(payload.readBigUInt64LE(8));
      const i = state.regions.findIndex((region) => region.guest === guest);
      if (i < 0) violation('REM_MEM_REG of a region that is not there');
      else dropRegions(state.regions.splice(i, 1));
      return undefined;
    }
    case 39:
      protocol('STATUS');
      state.status = Number(payload.readBigUInt64LE(0));
      return undefined;
    case 40:
      protocol('STATUS');
      return u64(state.status);
    default:
      return false;
  }
}

const isStarted = (ring) => ring.started === true;

function start(ring) {
  ring.started = true;
  if (has(state.features, Bit.RING_PACKED)) {
    if (ring.base !== 0x8000_8000) violation(`a packed ring that begins at ${ring.base.toString(16)}`);
  } else if (ring.base !== 0) violation(`a split ring that begins at ${ring.base}`);
  if (!has(state.features, Bit.PROTOCOL_FEATURES)) ring.enabled = true;
  ring.availIndex = 0;
  ring.usedIndex = 0;
  ring.availWrap = true;
  ring.usedWrap = true;
}

/** Areas again, because the memory may have been told anew. */
function areas(ring) {
  const [desc, used, avail] = ring.areas.addresses.map((address, i) => find('user', address, ring.areas.sizes[i]));
  return { desc, used, avail };
}

function pieceOf(descriptors, w) {
  const { u32 } = descriptors.region;
  const at = (descriptors.at >>> 2) + w * 4;
  const flagsAndNext = u32[at + 3];
  const address = u32[at] + u32[at + 1] * 2 ** 32;
  return { address, length: u32[at + 2], low: flagsAndNext & 0xffff, high: flagsAndNext >>> 16 };
}

/** The pieces of a buffer: of its descriptors, or of its indirect table. */
function indirect(piece, pieces, packed) {
  const table = find('guest', piece.address, piece.length);
  for (let i = 0, left = piece.length / 16; left > 0; left--) {
    const entry = pieceOf(table, i);
    const flags = packed ? entry.high : entry.low;
    pieces.push({ ...entry, flags });
    if (!packed && (flags & 1) === 0) break;
    i = packed ? i + 1 : entry.high;
  }
}

/** The next available buffer of a ring, or null; `used(ring, buffer, bytes)` gives it back. */
function next(ring) {
  return has(state.features, Bit.RING_PACKED) ? nextPacked(ring) : nextSplit(ring);
}

function nextSplit(ring) {
  const { desc, avail } = areas(ring);
  const index = Atomics.load(avail.region.u16, (avail.at >>> 1) + 1);
  if (index === (ring.availIndex & 0xffff)) return null;
  const head = avail.region.u16[(avail.at >>> 1) + 2 + (ring.availIndex % ring.size)];
  if (head >= ring.size) violation(`head ${head} in a ring of ${ring.size}`);
  const pieces = [];
  for (let id = head, count = 0; ; count++) {
    const piece = pieceOf(desc, id);
    if (count > ring.size) violation('a chain without end');
    if ((piece.low & 4) !== 0) indirect(piece, pieces, false);
    else pieces.push({ ...piece, flags: piece.low });
    if ((piece.low & 1) === 0 || count > ring.size) break;
    id = piece.high;
  }
  ring.availIndex++;
  return { id: head, pieces, count: 1 };
}

function nextPacked(ring) {
  const { desc } = areas(ring);
  const flagsAt = (w) => (desc.at >>> 1) + w * 8 + 7;
  const first = Atomics.load(desc.region.u16, flagsAt(ring.availIndex));
  const isAvail = ((first & 0x80) !== 0) === ring.availWrap && ((first & 0x8000) !== 0) !== ring.availWrap;
  if (!isAvail) return null;
  const pieces = [];
  let id = 0;
  let count = 0;
  for (;;) {
    const piece = pieceOf(desc, ring.availIndex);
    id = piece.low;
    if ((piece.high & 4) !== 0) indirect(piece, pieces, true);
    else pieces.push({ ...piece, flags: piece.high });
    count++;
    if (++ring.availIndex === ring.size) {
      ring.availIndex = 0;
      ring.availWrap = !ring.availWrap;
    }
    if ((piece.high & 1) === 0) break;
    if (count > ring.size) {
      violation('a chain without end');
      break;
    }
  }
  return { id, pieces, count };
}

function use(ring, { id, count }, bytes) {
  const { desc, used, avail } = areas(ring);
  if (has(state.features, Bit.RING_PACKED)) {
    const at = (desc.at >>> 1) + ring.usedIndex * 8;
    desc.region.u32[(desc.at >>> 2) + ring.usedIndex * 4 + 2] = bytes;
    desc.region.u16[at + 6] = id;
    Atomics.store(desc.region.u16, at + 7, (ring.usedWrap ? 0x8080 : 0) | (bytes > 0 ? 2 : 0));
    const before = ring.usedIndex;
    ring.usedIndex += count;
    if (ring.usedIndex >= ring.size) {
      ring.usedIndex -= ring.size;
      ring.usedWrap = !ring.usedWrap;
    }
    // Driver event suppression: enabled, disabled, or at one descriptor.
    const word = avail.region.u32[avail.at >>> 2];
    const mode = word >>> 16;
    const wanted = word & 0x7fff;
    const passed = ring.usedIndex > before ? wanted >= before && wanted < ring.usedIndex : true;
    if (mode === 0 || (mode === 2 && passed)) signal(ring);
    return;
  }
  const at = (used.at >>> 2) + 1 + 2 * (ring.usedIndex % ring.size);
  used.region.u32[at] = id;
  used.region.u32[at + 1] = bytes;
  ring.usedIndex++;
  if (has(state.features, Bit.EVENT_IDX)) {
    const event = (used.at >>> 1) + 2 + 4 * ring.size;
    Atomics.store(used.region.u16, event, ring.availIndex & 0xffff);
  }
  Atomics.store(used.region.u16, (used.at >>> 1) + 1, ring.usedIndex & 0xffff);
  const flags = avail.region.u16[avail.at >>> 1];
  const usedEvent = avail.region.u16[(avail.at >>> 1) + 2 + ring.size];
  const wanted = has(state.features, Bit.EVENT_IDX) ? usedEvent === ((ring.usedIndex - 1) & 0xffff) : (flags & 1) === 0;
  if (wanted) signal(ring);
}

function signal(ring) {
  if (ring.call >= 0) sys.write(ring.call, u64(1), 8);
}

function runs(ring) {
  if (ring === undefined || ring.started !== true || ring.areas === null) return false;
  if (!ring.kicked && ring.kick >= 0 && wait(ring.kick, 0)) ring.kicked = true;
  if (ring.kick >= 0 && ring.kicked && wait(ring.kick, 0)) sys.read(ring.kick, Buffer.alloc(8), 8);
  return ring.kicked;
}

const HEADER = 12;

/** Moves frames from each transmit ring to the receive ring beside it. */
function loop() {
  let moved = 0;
  for (const ring of [...state.rings.values()]) {
    if ((ring.index & 1) === 0 || !runs(ring)) continue;
    const target = state.rings.get(ring.index - 1);
    for (let i = 0; i < 64; i++) {
      const buffer = next(ring);
      if (buffer === null) break;
      moved++;
      const parts = [];
      for (const piece of buffer.pieces) {
        if ((piece.flags & 2) !== 0) violation('a writable piece in a transmit ring');
        const { region, at } = find('guest', piece.address, piece.length);
        parts.push(Buffer.from(region.u8.slice(at, at + piece.length)));
      }
      const frame = Buffer.concat(parts);
      if (frame.length <= HEADER) violation(`a frame of ${frame.length} bytes with its header`);
      // A disabled transmit ring is emptied without effect.
      if (ring.enabled) deliver(target, frame);
      use(ring, buffer, 0);
    }
  }
  return moved;
}

function deliver(ring, frame) {
  if (!runs(ring) || !ring.enabled) return;
  let rest = frame;
  const taken = [];
  while (rest.length > 0) {
    const buffer = next(ring);
    if (buffer === null) {
      // No room: what was taken goes back empty, and the frame is lost.
      for (const one of taken) use(ring, one.buffer, 0);
      tell({ event: 'no room' });
      return;
    }
    let written = 0;
    for (const piece of buffer.pieces) {
      if ((piece.flags & 2) === 0) violation('a readable piece in a receive ring');
      const { region, at } = find('guest', piece.address, piece.length);
      const part = rest.subarray(0, Math.min(piece.length, device.receivePiece ?? piece.length));
      region.u8.set(part, at);
      if (taken.length === 0 && written === 0) taken.push({ buffer, written: 0, region, at });
      rest = rest.subarray(part.length);
      written += part.length;
    }
    if (taken.at(-1).buffer === buffer) taken.at(-1).written = written;
    else taken.push({ buffer, written });
    if (rest.length > 0 && !has(state.features, Bit.MRG_RXBUF)) {
      violation('a frame that does not fit its buffer');
      break;
    }
  }
  // struct virtio_net_hdr: num_buffers @10.
  const { region, at } = taken[0];
  region.u8.fill(0, at, at + HEADER);
  region.u8[at + 10] = taken.length & 0xff;
  region.u8[at + 11] = taken.length >>> 8;
  for (const one of taken) use(ring, one.buffer, one.written);
}

function readMessage(fd) {
  const fds = [];
  const header = receive(fd, 12, fds);
  const payload = receive(fd, header.readUInt32LE(8), fds);
  const [request, flags] = [header.readUInt32LE(0), header.readUInt32LE(4)];
  if ((flags & ~8) !== 1) violation(`request ${request} with flags ${flags}`);
  if ((flags & 8) !== 0 && !has(state.protocol, Proto.REPLY_ACK)) violation('a reply wanted without REPLY_ACK');
  return { request, flags, payload, fds };
}

function encode(request, { flags = 5, payload = Buffer.alloc(0), size, request: other }) {
  const bytes = Buffer.alloc(12 + payload.length);
  bytes.writeUInt32LE(other ?? request, 0);
  bytes.writeUInt32LE(flags, 4);
  bytes.writeUInt32LE(size ?? payload.length, 8);
  bytes.set(payload, 12);
  return bytes;
}

function answer(fd, incoming) {
  const { request, flags } = incoming;
  const nth = (seen.get(request) ?? 0) + 1;
  seen.set(request, nth);
  const rule = rules.find((one) => one.request === request && (one.nth === undefined || one.nth === nth));
  tell({
    event: 'message',
    request,
    flags,
    payload: [...incoming.payload],
    descriptors: incoming.fds.length,
  });
  if (rule?.close === true) throw CLOSED;
  if (rule?.stall === true) {
    for (const one of incoming.fds) sys.close(one);
    return;
  }
  const own = rule?.refuse === true ? false : serve(incoming);
  const acknowledged = has(state.protocol, Proto.REPLY_ACK) && (flags & 8) !== 0;
  let payload = own;
  if (own === undefined || own === false) {
    if (!acknowledged) {
      if (rule?.unasked !== undefined) send(fd, Buffer.from(rule.unasked));
      if (rule?.error === true) signalError();
      return;
    }
    payload = u64(own === false ? 1 : 0);
  }
  const reply = { payload, ...rule?.reply };
  if (rule?.reply?.payload !== undefined) reply.payload = Buffer.from(rule.reply.payload);
  const bytes = encode(request, reply);
  const fds = rule?.descriptors === true ? [1] : [];
  if (rule?.partial !== undefined) {
    send(fd, bytes.subarray(0, rule.partial));
    if (rule.cut === true) throw CLOSED;
    return;
  }
  if (rule?.dribble === true) for (const byte of bytes) send(fd, [byte]);
  else send(fd, bytes, fds);
  if (rule?.unasked !== undefined) send(fd, Buffer.from(rule.unasked));
  if (rule?.error === true) signalError();
}

function signalError() {
  for (const ring of state.rings.values()) if (ring.err >= 0) sys.write(ring.err, u64(1), 8);
}

function open() {
  const fd = sys.socket(1, 1, 0);
  const address = Buffer.alloc(110);
  address.writeUInt16LE(1, 0);
  address.write(path, 2);
  if (connect) {
    while (sys.connect(fd, address, 110) !== 0) if (stopped()) throw CLOSED;
    return { fd, listener: -1 };
  }
  if (sys.bind(fd, address, 110) !== 0 || sys.listen(fd, 4) !== 0) throw new Error(`cannot listen on ${path}`);
  return { fd: -1, listener: fd };
}

function session(fd) {
  for (;;) {
    const moved = device.loop === true ? loop() : 0;
    if (wait(fd, moved > 0 ? 0 : 1)) answer(fd, readMessage(fd));
  }
}

function run() {
  const opened = connect ? null : open();
  tell({ event: 'ready' });
  let current = -1;
  try {
    const at = opened ?? open();
    if (at.listener >= 0) {
      while (!wait(at.listener, 5));
      current = sys.accept(at.listener, null, null);
      sys.close(at.listener);
    } else current = at.fd;
    if (device.greeting !== undefined) send(current, Buffer.from(device.greeting));
    session(current);
  } catch (error) {
    if (error !== CLOSED) tell({ event: 'violation', what: String(error?.stack ?? error) });
  }
  if (current >= 0) sys.close(current);
  for (const ring of state.rings.values())
    for (const fd of [ring.kick, ring.call, ring.err]) if (fd >= 0) sys.close(fd);
  dropRegions(state.regions);
  tell({ event: 'closed' });
}

function begin(setup) {
  become(setup);
  run();
}

if (parentPort === null) begin(JSON.parse(process.argv[2]));
else parentPort.on('message', begin);
