/**
 * Where an SA runs: inline if the device can express all of it, else in software, else nowhere. The reason is kept, because
 * hardware never supports everything and the user wants to know why.
 */
import { IpsecError } from '../errors.ts';
import type { SecurityAssociation } from './sa.ts';

export type Where = 'inline' | 'software';

export interface Placement {
  readonly where: Where;
  /** One clause for the user, such as `hmac-sha512 key does not fit the SA object`. */
  readonly because: string;
}

export interface PlacementRequest {
  readonly sa: SecurityAssociation;
  /** Refuse rather than place it elsewhere. */
  readonly require?: Where;
  /** Why the device cannot take this SA; null when it can. */
  readonly inlineObstacle: string | null;
  /** Why software cannot take this SA; null when it can. */
  readonly softwareObstacle: string | null;
}

/** What most SAs share. */
const INLINE: Placement = { where: 'inline', because: 'the device can express all of it' };
const REQUIRED_INLINE: Placement = { where: 'inline', because: 'inline is required' };

/** Decides. Throws IpsecError `NOT_OFFLOADABLE`, `SOFTWARE_NOT_AVAILABLE` or `NO_PLACE_FOR_SA`, with the reasons. */
export function place(request: PlacementRequest): Placement {
  const { inlineObstacle, softwareObstacle } = request;
  if (request.require === 'inline') {
    if (inlineObstacle !== null) throw new IpsecError('NOT_OFFLOADABLE', `the SA cannot run inline: ${inlineObstacle}`);
    return REQUIRED_INLINE;
  }
  if (request.require === 'software') {
    if (softwareObstacle !== null) {
      throw new IpsecError('SOFTWARE_NOT_AVAILABLE', `the SA cannot run in software: ${softwareObstacle}`);
    }
    return { where: 'software', because: 'software is required' };
  }
  if (inlineObstacle === null) return INLINE;
  if (softwareObstacle === null) return { where: 'software', because: inlineObstacle };
  throw new IpsecError(
    'NO_PLACE_FOR_SA',
    `the SA can run neither inline (${inlineObstacle}) nor in software (${softwareObstacle})`,
  );
}
