/**
 * A vfio-user server that does what it is told, right or wrong; run as a worker thread, because the client blocks. Each message to the
 * thread is a server to be, one after the other: to start a thread takes longer than most tests.
 *
 * It shares no code with `src`: system calls through koffi, layouts written down again from QEMU's vfio-user.rst. By default it is
 * a well-behaved device; rules (see `fake.ts`) change its answer to single messages.
 */

import { parentPort } from 'node:worker_threads';
import koffi from 'koffi';

const c = koffi.load(null);
const sys = {
  socket: c.func('int socket(int, int, int)'),
  bind: c.func('int bind(int, void *, uint32_t)'),
  listen: c.func('int listen(int, int)'),
  accept: c.func('int accept(int, void *, void *)'),
  poll: c.func('int poll(void *, uint64_t, int)'),
  recvmsg: c.func('int64_t recvmsg(int, void *, int)'),
  sendmsg: c.func('int64_t sendmsg(int, void *, int)'),
  close: c.func('int close(int)'),
};
/** What the server of the moment is to be, as `fake.ts` says it. */
let device;
let rules;
let stopFlag;
/** Its regions by index, and how many messages of a command have come, which is what rules go by. */
let regions;
let seen;
const stopped = () => Atomics.load(stopFlag, 0) !== 0;
const CLOSED = Symbol('closed');

function wait(fd) {
  const pollfd = Buffer.alloc(8);
  pollfd.writeInt32LE(fd, 0);
  pollfd.writeInt16LE(1, 4);
  while (!stopped()) if (sys.poll(pollfd, 1, 5) > 0) return;
  throw CLOSED;
}

function message(base, length, control) {
  const header = Buffer.alloc(72);
  header.writeBigUInt64LE(koffi.address(header) + 56n, 16);
  header.writeBigUInt64LE(1n, 24);
  header.writeBigUInt64LE(koffi.address(base), 56);
  header.writeBigUInt64LE(BigInt(length), 64);
  if (control !== null) {
    header.writeBigUInt64LE(koffi.address(control), 32);
    header.writeBigUInt64LE(BigInt(control.length), 40);
  }
  return header;
}

function receive(fd, length, fds) {
  const data = Buffer.alloc(length);
  for (let done = 0; done < length; ) {
    wait(fd);
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
  if (bytes.length === 0) return;
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

function readMessage(fd) {
  const fds = [];
  const header = receive(fd, 16, fds);
  const payload = receive(fd, header.readUInt32LE(4) - 16, fds);
  const flags = header.readUInt32LE(8);
  return {
    id: header.readUInt16LE(0),
    command: header.readUInt16LE(2),
    flags,
    error: header.readUInt32LE(12),
    payload,
    fds,
  };
}

function encode({ id, command, flags = 1, error = 0, payload = new Uint8Array(0), size }) {
  const bytes = Buffer.alloc(16 + payload.length);
  bytes.writeUInt16LE(id & 0xffff, 0);
  bytes.writeUInt16LE(command, 2);
  bytes.writeUInt32LE(size ?? bytes.length, 4);
  bytes.writeUInt32LE(flags, 8);
  bytes.writeUInt32LE(error, 12);
  bytes.set(payload, 16);
  return bytes;
}

const words = (...values) => Buffer.from(Uint32Array.from(values).buffer);

function regionInfo(index, argsz) {
  const region = regions.get(index);
  if (region === undefined) return { payload: words(32, 0, index, 0, 0, 0, 0, 0) };
  const caps = region.caps === undefined ? Buffer.alloc(0) : Buffer.from(region.caps);
  const needed = 32 + caps.length;
  const flags = region.flags | (caps.length > 0 ? 8 : 0);
  const info = words(needed, flags, index, caps.length > 0 ? 32 : 0, region.bytes.length, 0, region.offset ?? 0, 0);
  const fds = region.fd === undefined ? [] : [region.fd];
  return { payload: needed <= argsz ? Buffer.concat([info, caps]) : info, fds };
}

function answer({ command, payload }) {
  switch (command) {
    case 1:
      return {
        payload: Buffer.concat([
          Buffer.alloc(4),
          Buffer.from(`${JSON.stringify({ capabilities: device.capabilities })}\0`),
        ]),
      };
    case 3:
      return { payload: payload.subarray(0, 24) };
    case 4:
      return { payload: words(16, device.flags, device.regionCount, device.irqCount) };
    case 5:
      return regionInfo(payload.readUInt32LE(8), payload.readUInt32LE(0));
    case 7:
      return { payload: words(16, device.irqFlags, payload.readUInt32LE(8), device.vectors) };
    case 9: {
      const at = payload.readUInt32LE(0);
      const count = payload.readUInt32LE(12);
      const bytes = regions.get(payload.readUInt32LE(8)).bytes;
      return { payload: Buffer.concat([payload.subarray(0, 16), bytes.subarray(at, at + count)]) };
    }
    case 10:
      payload.copy(regions.get(payload.readUInt32LE(8)).bytes, payload.readUInt32LE(0), 16);
      return { payload: payload.subarray(0, 16) };
    default:
      return {};
  }
}

function handle(fd, request) {
  const { id, command, flags } = request;
  const normal = answer(request);
  const nth = (seen.get(command) ?? 0) + 1;
  seen.set(command, nth);
  const rule = rules.find((r) => r.command === command && (r.nth === undefined || r.nth === nth));
  for (const bytes of rule?.before ?? []) {
    send(fd, bytes);
    if (rule.replies !== false) parentPort.postMessage({ kind: 'reply', ...readMessage(fd) });
  }
  if (rule?.flood !== undefined) {
    // Asks until the client has had enough.
    for (;;) {
      send(fd, rule.flood);
      if (rule.replies !== false) readMessage(fd);
    }
  }
  if (rule?.raw !== undefined) send(fd, rule.raw, rule.fds);
  if (rule?.close) throw CLOSED;
  if (rule?.stall || rule?.raw !== undefined || (flags & 0x10) !== 0) return;
  const { id: skew = 0, ...override } = rule?.reply ?? {};
  const { fds = [], ...fields } = { ...normal, command, ...override, id: id + skew };
  const bytes = encode(fields);
  if (rule?.dribble) for (const byte of bytes) send(fd, [byte]);
  else send(fd, rule?.cut === undefined ? bytes : bytes.subarray(0, rule.cut), fds);
  if (rule?.cut !== undefined) throw CLOSED;
  for (const after of rule?.after ?? []) {
    send(fd, after);
    if (rule.replies !== false) parentPort.postMessage({ kind: 'reply', ...readMessage(fd) });
  }
}

function serve(path) {
  const listener = sys.socket(1, 1, 0);
  const address = Buffer.alloc(110);
  address.writeUInt16LE(1, 0);
  address.write(path, 2);
  if (sys.bind(listener, address, 110) < 0 || sys.listen(listener, 4) < 0) throw new Error(`cannot listen on ${path}`);
  parentPort.postMessage({ kind: 'listening' });
  try {
    for (;;) {
      wait(listener);
      session(sys.accept(listener, null, null));
    }
  } catch (error) {
    if (error !== CLOSED) throw error;
  } finally {
    sys.close(listener);
  }
}

function session(fd) {
  try {
    if (device.greeting !== undefined) send(fd, Buffer.from(device.greeting));
    for (;;) {
      const request = readMessage(fd);
      parentPort.postMessage({ kind: 'request', ...request });
      handle(fd, request);
    }
  } catch (error) {
    if (error !== CLOSED) throw error;
  } finally {
    sys.close(fd);
    parentPort.postMessage({ kind: 'closed' });
  }
}

parentPort.on('message', (setup) => {
  ({ device, rules } = setup);
  stopFlag = new Int32Array(setup.stop);
  regions = new Map(device.regions.map((region) => [region.index, { ...region, bytes: Buffer.from(region.bytes) }]));
  seen = new Map();
  serve(setup.path);
  parentPort.postMessage({ kind: 'stopped' });
});
