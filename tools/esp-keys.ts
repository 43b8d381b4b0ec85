/**
 * Decryption files for Wireshark: the table `esp_sa` of its ESP preferences, one SA a line of eight quoted columns
 * (protocol, source, destination, SPI, encryption, its key, authentication, its key). tshark takes a line as
 * `-o 'uat:esp_sa:LINE'`; Wireshark reads the file as `esp_sa` in a profile folder.
 *
 * Wireshark 4.0 knows no AES-CCM, AES-GMAC, ChaCha20-Poly1305, AES-XCBC and AES-CMAC as decryption or check; of the
 * authenticators it cannot check it is told the length, of the ciphers it cannot decrypt there is no line. AH carries
 * nothing to decrypt.
 *
 * The file holds keys: it is made readable by its owner only.
 */
import { closeSync, fchmodSync, openSync, writeFileSync } from 'node:fs';
import type { SecurityAssociation } from '../src/ipsec/sa.ts';
import { formatIp } from '../src/packet/addresses.ts';

const Cipher = {
  null: 'NULL',
  'aes-cbc': 'AES-CBC [RFC3602]',
  'aes-ctr': 'AES-CTR [RFC3686]',
  '3des-cbc': 'TripleDES-CBC [RFC2451]',
} as const;

const Authenticator: Readonly<Record<string, string>> = {
  'hmac-sha1': 'HMAC-SHA-1-96 [RFC2404]',
  'hmac-sha256': 'HMAC-SHA-256-128 [RFC4868]',
  'hmac-sha384': 'HMAC-SHA-384-192 [RFC4868]',
  'hmac-sha512': 'HMAC-SHA-512-256 [RFC4868]',
  'aes-xcbc': 'ANY 96 bit authentication [no checking]',
  'aes-cmac': 'ANY 96 bit authentication [no checking]',
};

function hex(...parts: (Uint8Array | undefined)[]): string {
  const bytes = Buffer.concat(parts.map((part) => part ?? new Uint8Array(0)));
  const text = bytes.toString('hex');
  bytes.fill(0);
  return text === '' ? '' : `0x${text}`;
}

/** Names and keys of the algorithms; `null` when Wireshark cannot decrypt them. */
function algorithms(sa: SecurityAssociation): string[] | null {
  const { aead, cipher, auth } = sa;
  if (aead !== undefined) {
    if (aead.name !== 'aes-gcm') return null;
    return [`AES-GCM with ${aead.icvLength} octet ICV [RFC4106]`, hex(aead.key, aead.salt), 'NULL', ''];
  }
  if (cipher === undefined || auth === undefined || !(auth.name in Authenticator)) return null;
  const key = auth.name.startsWith('hmac') ? hex(auth.key) : '';
  return [Cipher[cipher.name], hex(cipher.key, cipher.salt), Authenticator[auth.name], key];
}

/** The line for `sa`, or `null` when Wireshark cannot decrypt it. Contains the keys. */
export function espKeysLine(sa: SecurityAssociation): string | null {
  const names = sa.protocol === 'esp' ? algorithms(sa) : null;
  if (names === null) return null;
  const destination = sa.tunnel?.destination ?? sa.selector.destination?.address;
  const source = sa.tunnel?.source ?? sa.selector.source?.address;
  const v6 = (destination ?? source)?.length === 16;
  const end = (address: Uint8Array | undefined, whole: boolean): string =>
    address === undefined || !whole ? '*' : formatIp(address);
  const columns = [
    v6 ? 'IPv6' : 'IPv4',
    end(source, sa.tunnel !== undefined || sa.selector.source?.length === (v6 ? 128 : 32)),
    end(destination, sa.tunnel !== undefined || sa.selector.destination?.length === (v6 ? 128 : 32)),
    `0x${sa.spi.toString(16).padStart(8, '0')}`,
    ...names,
  ];
  return columns.map((column) => `"${column}"`).join(',');
}

/**
 * Lines for all of `sas`. An SA without addresses gets one for each family. `skipped` names those that Wireshark cannot
 * decrypt, by their SPI.
 */
export function espKeys(sas: readonly SecurityAssociation[]): { lines: string[]; skipped: string[] } {
  const lines: string[] = [];
  const skipped: string[] = [];
  for (const sa of sas) {
    const line = espKeysLine(sa);
    if (line === null) {
      skipped.push(`0x${sa.spi.toString(16)}`);
      continue;
    }
    lines.push(line);
    if (line.startsWith('"IPv4","*","*"')) lines.push(line.replace('"IPv4"', '"IPv6"'));
  }
  return { lines, skipped };
}

/** Writes the decryption file. Returns the SPIs of the SAs that are not in it. */
export function writeEspKeys(path: string, sas: readonly SecurityAssociation[]): string[] {
  const { lines, skipped } = espKeys(sas);
  const fd = openSync(path, 'w', 0o600);
  try {
    // The mode above counts for a new file only.
    fchmodSync(fd, 0o600);
    // All of it: a disk that becomes full takes the first part of one write.
    writeFileSync(fd, lines.map((line) => `${line}\n`).join(''));
  } finally {
    closeSync(fd);
  }
  return skipped;
}
