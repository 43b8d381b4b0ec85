/**
 * Layouts of the ratified standard (Virtio 1.4, crypto device, "IPsec Service Operation": `struct virtio_crypto_ipsec_mode_cap`,
 * `struct virtio_crypto_resource_obj_ipsec_sa_256b_key`). Bytes, without implicit padding.
 */
import type { WireLayout } from './codec.ts';
import { SaOption } from './numbers.ts';

export const virtio14Layout: WireLayout = {
  revision: 'virtio-1.4',
  options:
    SaOption.esn |
    SaOption.udpEncap |
    SaOption.copyDscp |
    SaOption.decrementTtl |
    SaOption.copyDf |
    SaOption.ecn |
    SaOption.lifetime,
  modeCapability: {
    size: 44,
    mode: 0, // u8, reserved[3]
    maxReplayWindow: 4, // le32
    options: 8, // le32, reserved1 le32
    ciphers: 16, // le64
    macs: 24, // le64
    aeads: 32, // le32
    maxCipherKeyLength: 36, // le32
    maxAuthKeyLength: 40, // le32
  },
  sa: {
    size: 196,
    mode: 0, // u8
    direction: 1, // u8, reserved[2]
    objectId: 4, // le32
    spi: 8, // le32
    salt: 12, // le32 holding four bytes in order
    options: 16, // le64
    tunnelType: 24, // u8, reserved[3]
    tunnel: 28, // union
    tunnelSize: 40,
    udpSourcePort: 68, // le16
    udpDestinationPort: 70, // le16
    replayWindow: 72, // le32
    cipherAlgorithm: 76, // le64
    cipherKey: { length: 84, data: 88 }, // le16, reserved1 le16, data[32]
    authAlgorithm: 120, // le64
    authKey: { length: 128, data: 132 }, // le16, reserved2 le16, data[32]
    lifetime: { softPackets: 164, softBytes: 172, hardPackets: 180, hardBytes: 188 }, // le64 each
  },
};
