/**
 * Which network interfaces this session depends on: those of the default routes, and the one that leads back to whoever
 * is logged in over SSH. Taking such a function away would cut the user off.
 *
 * Reads the main routing tables of procfs (proc(5): net/route, net/ipv6_route). Left out: policy routing, other name spaces.
 */
import { isIPv4 } from 'node:net';
import { join } from 'node:path';
import { folder, type KernelFiles, text } from './sysfs.ts';

const RTF_UP = 0x1;
const RTF_REJECT = 0x200;
const LOOPBACK = 'lo';

interface Route {
  readonly interface: string;
  /** Network-order bytes. */
  readonly prefix: Uint8Array;
  /** Bits. */
  readonly length: number;
  readonly metric: number;
}

/**
 * The first of `interfaces` that carries a route this session depends on, and why; undefined when none does. An interface
 * that is part of another one (bridge, bond, VLAN) counts with it.
 */
export function neededInterface(
  interfaces: readonly string[],
  files: KernelFiles,
  sshConnection: string | undefined,
): { interface: string; because: string } | undefined {
  const tables = [routes4(files), routes6(files)];
  const reasons = new Map<string, string>();
  for (const table of tables) {
    for (const route of table) if (route.length === 0) reasons.set(route.interface, 'the default route');
  }
  const client = addressBytes(sshConnection?.split(' ')[0]);
  if (client !== undefined) {
    const way = lookup(tables[client.length === 4 ? 0 : 1], client);
    if (way !== undefined) reasons.set(way.interface, 'the route of this SSH session');
  }
  for (const [upper, because] of reasons) {
    const below = withLower(upper, files);
    const found = interfaces.find((name) => below.has(name));
    if (found !== undefined) return { interface: found, because };
  }
  return undefined;
}

/** `upper` and every interface that it is made of. */
function withLower(upper: string, files: KernelFiles): Set<string> {
  const found = new Set<string>();
  const visit = (name: string) => {
    if (found.has(name)) return;
    found.add(name);
    for (const entry of folder(join(files.sys, 'class/net', name))) {
      if (entry.startsWith('lower_')) visit(entry.slice('lower_'.length));
    }
  };
  visit(upper);
  return found;
}

/** Longest prefix, then lowest metric. */
function lookup(table: readonly Route[], address: Uint8Array): Route | undefined {
  let best: Route | undefined;
  for (const route of table) {
    if (!covers(route, address)) continue;
    const better = best === undefined || route.length > best.length;
    if (better || (route.length === best?.length && route.metric < best.metric)) best = route;
  }
  return best;
}

function covers({ prefix, length }: Route, address: Uint8Array): boolean {
  for (let bit = 0; bit < length; bit++) {
    const mask = 0x80 >> (bit & 7);
    if (((prefix[bit >> 3] ^ address[bit >> 3]) & mask) !== 0) return false;
  }
  return true;
}

/** Columns: Iface Destination Gateway Flags RefCnt Use Metric Mask …; addresses as the machine reads them, in hexadecimal. */
function routes4(files: KernelFiles): Route[] {
  const lines = (text(join(files.proc, 'net/route')) ?? '').split('\n').slice(1);
  return lines.flatMap((line) => {
    const [name, destination = '', , flags = '', , , metric, mask = ''] = line.trim().split(/\s+/);
    const bits = Number.parseInt(flags, 16);
    if (!/^[0-9a-f]{8}$/i.test(destination) || !/^[0-9a-f]{8}$/i.test(mask)) return [];
    if ((bits & RTF_UP) === 0 || (bits & RTF_REJECT) !== 0) return [];
    const prefix = Uint8Array.from(Buffer.from(destination, 'hex').reverse());
    return [{ interface: name, prefix, length: ones(Number.parseInt(mask, 16)), metric: Number(metric) }];
  });
}

/** Columns: destination, its prefix length, source, its length, next hop, metric, references, use, flags, interface. */
function routes6(files: KernelFiles): Route[] {
  const lines = (text(join(files.proc, 'net/ipv6_route')) ?? '').split('\n');
  return lines.flatMap((line) => {
    const [destination = '', length = '', , , , metric = '', , , flags = '', name = ''] = line.trim().split(/\s+/);
    const bits = Number.parseInt(flags, 16);
    if (!/^[0-9a-f]{32}$/i.test(destination) || name === LOOPBACK) return [];
    if ((bits & RTF_UP) === 0 || (bits & RTF_REJECT) !== 0) return [];
    const prefix = Uint8Array.from(Buffer.from(destination, 'hex'));
    return [{ interface: name, prefix, length: Number.parseInt(length, 16), metric: Number.parseInt(metric, 16) }];
  });
}

function ones(mask: number): number {
  let count = 0;
  for (let rest = mask; rest !== 0; rest &= rest - 1) count++;
  return count;
}

/** Network-order bytes of an address of SSH_CONNECTION; an IPv4 address may be written as `::ffff:a.b.c.d`. */
function addressBytes(address: string | undefined): Uint8Array | undefined {
  if (address === undefined) return undefined;
  const plain = address.replace(/^::ffff:(?=\d+\.)/i, '').replace(/%.*$/, '');
  if (isIPv4(plain)) return Uint8Array.from(plain.split('.').map(Number));
  if (!/^[0-9a-f:]+$/i.test(plain)) return undefined;
  const [head, tail] = plain.split('::');
  const groups = (part: string | undefined) => (part ? part.split(':').map((group) => Number.parseInt(group, 16)) : []);
  const before = groups(head);
  const after = groups(tail);
  const zeros = tail === undefined ? 0 : 8 - before.length - after.length;
  if (zeros < 0) return undefined;
  const all = [...before, ...new Array<number>(zeros).fill(0), ...after];
  if (all.length !== 8) return undefined;
  return Uint8Array.from(all.flatMap((group) => [group >> 8, group & 0xff]));
}
