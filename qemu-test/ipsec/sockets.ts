/**
 * Sockets of the kernel's, not of Node's: they can be made in another network namespace than the rest of the process is in, and packets go through
 * them without streams. All of them are non-blocking and connected to one peer, so that read(2) and write(2) are all they need. A socket stays in
 * the namespace that it was made in (network_namespaces(7)).
 */
import { writeFileSync } from 'node:fs';
import { parseIp } from '../../src/packet/addresses.ts';
import { ffi } from '../../src/sys/ffi/ffi.ts';
import { close, Socket, systemError } from '../../src/sys/libc.ts';
import { mapAnonymous } from '../../src/sys/memory.ts';
import { inNamespace } from '../guest/network-namespace.ts';

/** socket(2), ip(7), ipv6(7): of Linux on x86-64. `ping` is a datagram socket for echo requests (icmp(7)). */
const Domain = { 4: 2, 6: 10 } as const;
const Type = { tcp: 1, udp: 2, ping: 2 } as const;
const Protocol = { tcp: { 4: 0, 6: 0 }, udp: { 4: 0, 6: 0 }, ping: { 4: 1, 6: 58 } } as const;
export type SocketKind = keyof typeof Type;
/** struct sockaddr_in and sockaddr_in6: family u16 @0, port u16 BE @2, the address @4 or @8. */
const Address = { 4: { bytes: 16, at: 4 }, 6: { bytes: 28, at: 8 } } as const;
const SOL_SOCKET = 1;
const SO_REUSEADDR = 2;
const EINPROGRESS = 115;
const SHUT_WR = 1;
const PING_GROUPS = '/proc/sys/net/ipv4/ping_group_range';

export interface Endpoint {
  readonly address: string;
  readonly port: number;
}

/** Lets sockets for echo requests be made in a namespace (ip-sysctl, ping_group_range), by root's group only, or by nobody any more. */
export function allowPings(namespace: string | null, allowed: boolean): void {
  inNamespace(namespace, () => writeFileSync(PING_GROUPS, allowed ? '0 0' : '1 0'));
}

/** A socket bound to `local`, in the namespace where this is called. */
export function openSocket(kind: SocketKind, local: Endpoint): number {
  const family = familyOf(local);
  const type = Type[kind] | Socket.nonblock | Socket.cloexec;
  const fd = must('socket', native().socket(Domain[family], type, Protocol[kind][family]));
  try {
    if (kind === 'tcp') reuseAddress(fd);
    must('bind', native().bind(fd, layOut(local), Address[family].bytes));
    return fd;
  } catch (error) {
    close(fd);
    throw error;
  }
}

/** socket(7): connections that have ended do not keep their port. */
function reuseAddress(fd: number): void {
  const { memory, setsockopt } = native();
  memory.u32[0] = 1;
  must('setsockopt', setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, memory.address, 4));
}

/** Connects to `remote`; of TCP it only begins to. */
export function connectSocket(fd: number, remote: Endpoint): void {
  const result = native().connect(fd, layOut(remote), Address[familyOf(remote)].bytes);
  if (result < 0 && ffi().errno() !== EINPROGRESS) throw systemError('connect', ffi().errno());
}

/** Says that nothing more will be sent. */
export function endSending(fd: number): void {
  must('shutdown', native().shutdown(fd, SHUT_WR));
}

const familyOf = ({ address }: Endpoint) => (address.includes(':') ? 6 : 4);

/** Writes the address as the kernel takes it; returns where. */
function layOut({ address, port }: Endpoint): number {
  const family = familyOf({ address, port });
  const bytes = parseIp(address);
  if (bytes === null) throw new Error(`${address} is no address`);
  const { u8, u16, address: at } = native().memory;
  u8.fill(0, 0, Address[family].bytes);
  u16[0] = Domain[family];
  u8[2] = port >> 8;
  u8[3] = port & 0xff;
  u8.set(bytes, Address[family].at);
  return at;
}

function must(call: string, result: number): number {
  if (result < 0) throw systemError(call, ffi().errno());
  return result;
}

let bound: ReturnType<typeof bind> | undefined;

function native() {
  bound ??= bind();
  return bound;
}

function bind() {
  const c = ffi().open(null);
  return {
    memory: mapAnonymous(64),
    socket: c.func('socket', 'i32', ['i32', 'i32', 'i32']),
    bind: c.func('bind', 'i32', ['i32', 'i64', 'u32']),
    connect: c.func('connect', 'i32', ['i32', 'i64', 'u32']),
    setsockopt: c.func('setsockopt', 'i32', ['i32', 'i32', 'i32', 'i64', 'u32']),
    shutdown: c.func('shutdown', 'i32', ['i32', 'i32']),
  };
}
