/**
 * A UDP socket of the kernel that hands UDP-encapsulated ESP to XFRM (RFC 3948; udp(7), UDP_ENCAP): an IKE daemon's job on a
 * real machine. Node's own sockets cannot set the option.
 */
import { ffi } from '../../src/sys/ffi/ffi.ts';
import { close, systemError } from '../../src/sys/libc.ts';
import { mapAnonymous, unmapMemory } from '../../src/sys/memory.ts';

const AF_INET = 2;
const SOCK_DGRAM = 2;
const IPPROTO_UDP = 17;
/** linux/udp.h. */
const UDP_ENCAP = 100;
const UDP_ENCAP_ESPINUDP = 2;
/** struct sockaddr_in: family u16 @0, port u16 BE @2, address @4; 16 bytes. */
const SOCKADDR_IN = 16;
const OPTION_AT = 32;

/** Opens it on every IPv4 address of this machine; returns how to close it. */
export function openEncapsulationSocket(port: number): () => void {
  const c = ffi().open(null);
  const socket = c.func('socket', 'i32', ['i32', 'i32', 'i32']);
  const bind = c.func('bind', 'i32', ['i32', 'i64', 'u32']);
  const setsockopt = c.func('setsockopt', 'i32', ['i32', 'i32', 'i32', 'i64', 'u32']);
  const memory = mapAnonymous(64);
  memory.u16[0] = AF_INET;
  memory.u8[2] = port >> 8;
  memory.u8[3] = port & 0xff;
  memory.u32[OPTION_AT / 4] = UDP_ENCAP_ESPINUDP;
  const must = (call: string, result: number) => {
    if (result < 0) throw systemError(call, ffi().errno());
    return result;
  };
  const fd = must('socket', socket(AF_INET, SOCK_DGRAM, 0));
  must('bind', bind(fd, memory.address, SOCKADDR_IN));
  must('setsockopt', setsockopt(fd, IPPROTO_UDP, UDP_ENCAP, memory.address + OPTION_AT, 4));
  unmapMemory(memory);
  return () => close(fd);
}
