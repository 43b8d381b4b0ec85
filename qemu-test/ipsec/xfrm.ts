/**
 * A case of the matrix as the Linux kernel wants it: the `ip xfrm` commands for its two states and two policies (ip-xfrm(8)).
 */
import {
  type Algorithms,
  applicationAddress,
  type End,
  type InteropCase,
  NAT_T_PORT,
  ourSa,
  saEnds,
  spiOf,
} from './cases.ts';

const IPPROTO_UDP = 17;
/** The lower one is looked at first. */
const Priority = { first: 1, second: 2 } as const;
const NO_ADDRESS = { 4: '0.0.0.0', 6: '::' } as const;

/** Names of the kernel's crypto API, and where a nonce is part of the key it is appended to it. */
const AEAD = {
  'aes-gcm': 'rfc4106(gcm(aes))',
  'aes-ccm': 'rfc4309(ccm(aes))',
  'chacha20-poly1305': 'rfc7539esp(chacha20,poly1305)',
  'aes-gmac': 'rfc4543(gcm(aes))',
} as const;
const CIPHER = {
  null: 'cipher_null',
  'aes-cbc': 'cbc(aes)',
  'aes-ctr': 'rfc3686(ctr(aes))',
  '3des-cbc': 'cbc(des3_ede)',
} as const;
const AUTH = {
  null: 'digest_null',
  'hmac-sha1': 'hmac(sha1)',
  'hmac-sha256': 'hmac(sha256)',
  'hmac-sha384': 'hmac(sha384)',
  'hmac-sha512': 'hmac(sha512)',
  'aes-xcbc': 'xcbc(aes)',
  'aes-cmac': 'cmac(aes)',
  'aes-gmac': 'gmac(aes)',
} as const;

/** Lines for `ip -batch -` that set case `index` up, beside the others. */
export function xfrmCommands(item: InteropCase, index: number): string[] {
  return [
    state(item, index, 'ours'),
    state(item, index, 'kernel'),
    policy(item, index, 'in', 'ours'),
    policy(item, index, 'out', 'kernel'),
    ...(item.natTraversal && item.mode === 'transport' ? [encapsulationPolicy(item, index)] : []),
  ];
}

/** The line that shows the state for packets that `from` sends. */
export function showState(item: InteropCase, index: number, from: End): string {
  return `xfrm state get ${identity(item, index, from)}`;
}

/** What a policy finds its states by: each case has its own. */
const requestId = (index: number) => index + 1;

/** What names a state (RFC 4301, 4.1), and its source. */
function identity(item: InteropCase, index: number, from: End): string {
  const { source, destination } = saEnds(item, index, from);
  return `src ${source} dst ${destination} proto ${item.algorithms.protocol ?? 'esp'} spi ${spiOf(index, from)}`;
}

/** The encapsulating UDP packets themselves need no protection: what an IKE daemon says for its socket. */
function encapsulationPolicy(item: InteropCase, index: number): string {
  const { source, destination } = saEnds(item, index, 'ours');
  const ports = `proto ${IPPROTO_UDP} sport ${NAT_T_PORT} dport ${NAT_T_PORT}`;
  return `xfrm policy add dir in src ${source} dst ${destination} ${ports} priority ${Priority.first}`;
}

/** The state for packets that `from` sends. */
function state(item: InteropCase, index: number, from: End): string {
  const { mode, outer, natTraversal, replayWindow, esn } = item;
  // RFC 4302, 3.3.3.2.1: over IPv4 an AH header is a multiple of 4 bytes. Linux makes it one of 8 unless told so.
  const align = item.algorithms.protocol === 'ah' && outer === 4 ? ['align4'] : [];
  const flags = [...(esn ? ['esn'] : []), ...(mode === 'tunnel' ? ['af-unspec'] : []), ...align];
  return [
    `xfrm state add ${identity(item, index, from)}`,
    `reqid ${requestId(index)} mode ${mode} replay-window ${replayWindow}`,
    ...(flags.length === 0 ? [] : [`flag ${flags.join(' flag ')}`]),
    algorithms(ourSa(item, index, from)),
    ...(natTraversal ? [`encap espinudp ${NAT_T_PORT} ${NAT_T_PORT} ${NO_ADDRESS[outer]}`] : []),
  ].join(' ');
}

/** What `from` sends must be protected: sent so (`out`), or else not accepted (`in`). */
function policy(item: InteropCase, index: number, direction: 'in' | 'out', from: End): string {
  const { source, destination } = saEnds(item, index, from);
  const { mode, inner, algorithms } = item;
  const bits = inner === 4 ? 32 : 128;
  const to = from === 'ours' ? 'kernel' : 'ours';
  const host = (end: End) => `${applicationAddress(end, index, inner)}/${bits}`;
  const template = mode === 'tunnel' ? `src ${source} dst ${destination} ` : '';
  return [
    `xfrm policy add dir ${direction} src ${host(from)} dst ${host(to)} priority ${Priority.second}`,
    `tmpl ${template}proto ${algorithms.protocol ?? 'esp'} reqid ${requestId(index)} mode ${mode}`,
  ].join(' ');
}

function algorithms({ aead, cipher, auth }: Algorithms): string {
  const parts: string[] = [];
  if (aead !== undefined) parts.push(`aead ${AEAD[aead.name]} 0x${aead.key}${aead.salt} ${Number(aead.icvLength) * 8}`);
  if (cipher !== undefined) {
    const key = `${cipher.key ?? ''}${cipher.salt ?? ''}`;
    parts.push(`enc ${CIPHER[cipher.name]} ${key === '' ? '""' : `0x${key}`}`);
  }
  if (auth !== undefined) parts.push(`auth-trunc ${AUTH[auth.name]} 0x${auth.key} ${Number(auth.icvLength) * 8}`);
  return parts.join(' ');
}
