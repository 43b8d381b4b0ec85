/** What an administration command came to, inside the device. */
import { AdminQualifier, AdminStatus } from '../virtio/admin-wire.ts';

export interface CommandResult {
  /** `AdminStatus`. */
  readonly status: number;
  /** `AdminQualifier`. */
  readonly qualifier: number;
  /** `command_specific_result`; absent when there is none. */
  readonly result?: Uint8Array;
}

export const OK_RESULT: CommandResult = { status: AdminStatus.OK, qualifier: AdminQualifier.OK };

export function succeeded(result: Uint8Array): CommandResult {
  return { status: AdminStatus.OK, qualifier: AdminQualifier.OK, result };
}

export function failed(status: number, qualifier: number): CommandResult {
  return { status, qualifier };
}
